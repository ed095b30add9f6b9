"""report: what runs came to, as one HTML file."""
