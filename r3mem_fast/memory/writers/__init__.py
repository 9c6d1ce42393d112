"""Writers: how a memory is made of a segment that has been read."""
