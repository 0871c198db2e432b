"""Other people's ways of saving, so that rivals never enter a normal install."""
