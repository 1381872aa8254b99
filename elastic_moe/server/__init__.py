"""An HTTP server with OpenAI's endpoints, on which every request chooses its sub-network."""
