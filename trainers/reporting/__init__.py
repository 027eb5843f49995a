"""What a run tells: means over epochs, early stopping, loggers, and a progress bar."""
