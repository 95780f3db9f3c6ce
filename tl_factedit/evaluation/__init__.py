"""What a change does: scores, specificity, drift, gains."""
