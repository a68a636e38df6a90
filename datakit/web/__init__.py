"""What local web apps share: who may ask (`guard`), and ranges of files over HTTP (`http_range`)."""
