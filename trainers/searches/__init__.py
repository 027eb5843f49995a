"""Grid searches: the main entry point, the folder of a search, and what runs its experiments; works without torch."""
