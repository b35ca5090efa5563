"""`shoal.data`: Ray Data processors whose engines are Shoal's."""
