"""What is found here, in the terms of other libraries, which do the rest."""
