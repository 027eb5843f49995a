"""Speed and memory of this library against its alternatives; see the README beside this file."""
