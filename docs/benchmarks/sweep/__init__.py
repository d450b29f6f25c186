"""The sweep: every model of torchvision and timm through survey, plan, rewrite and the shape guard."""
