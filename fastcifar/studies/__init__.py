"""Many trainings that answer one question: ablations, sweeps, tuning, and the table of the reports."""
