"""What compare_priors and evidence_check compute."""
