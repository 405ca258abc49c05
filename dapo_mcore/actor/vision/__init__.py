"""What a policy that sees has beside a decoder of text: positions in images, a vision tower, and its features."""
