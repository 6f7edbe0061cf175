"""Generic stages that the field takes for granted."""
