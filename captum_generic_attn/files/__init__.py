"""Files that come from outside: tensors in safetensors files, and images of bounded size."""
