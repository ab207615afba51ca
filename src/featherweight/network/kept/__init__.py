"""What a network keeps until it is changed: where its tensors lie, the shapes that flow, what follows from them."""
