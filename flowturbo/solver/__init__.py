"""The method: the path, the steps and the plans. It knows no model."""
