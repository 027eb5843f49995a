"""The command `modelbatch`. But for `modelbatch doctor` it needs the extra `demo`, which nothing else here needs."""
