"""Language models behind one interface: vLLM, transformers, and endpoints that speak OpenAI's API."""
