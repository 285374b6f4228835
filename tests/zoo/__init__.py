"""Models of many families, and the independent references that their explanations are held to."""
