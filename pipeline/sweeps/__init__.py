"""From the trials of a sweep to its answer: statistics, report, figures and the best recipe. No Ray and no MLflow in here."""
