"""Hold what notebooks and benchmarks need around `lora_utils`: data, training, comparing and drawing."""
