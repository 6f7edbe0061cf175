"""What features, classifiers and their heads fold into, and training that uses or prevents it."""
