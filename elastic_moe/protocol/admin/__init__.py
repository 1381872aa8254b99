"""Bodies and answers below /admin/."""
