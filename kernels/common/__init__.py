"""What all operations share: version guards, and which implementation of an operation runs."""
