"""What touches objects of other libraries, and knows how their versions differ."""
