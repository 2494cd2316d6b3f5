"""What a study takes on named hardware, from its text alone."""
