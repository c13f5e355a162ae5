"""Settings: every field, the recipe they make up, the checks across fields, and loading from YAML and overrides."""
