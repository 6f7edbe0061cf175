"""The model zoo: tiny, smollm2-135m, any Hub id or local path."""
