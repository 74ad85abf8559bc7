"""What several test files share. Programs that tests start by their path lie beside those tests."""
