"""Training predictors and refiners."""
