"""What a model's answer is made of besides text: its reasoning, and calls of tools in the form that it was taught."""
