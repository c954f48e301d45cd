"""What the study is made of: from the configuration of a run to its results."""
