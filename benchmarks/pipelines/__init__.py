"""Every pipeline schedule on processes of this machine: predicted, measured, against torch."""
