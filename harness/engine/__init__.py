"""What makes an image: tokens reduced inside unmodified blocks, and the denoising loop."""
