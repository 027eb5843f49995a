"""Running a pack: experiments that a function builds, trained as one batch, each with a folder of its own."""
