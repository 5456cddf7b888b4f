"""Small models, texts and matrices that tests are made of; nothing here is downloaded."""
