"""What is kept on disk: durable files, the content-addressed store, records, hashes of code and content."""
