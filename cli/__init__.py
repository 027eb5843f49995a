"""The command `modelbatch`. It needs the extra `demo`, which nothing else of this distribution needs."""
