"""The method: the path, the steps, plans. It knows no model."""
