"""Other libraries' habits, each in a file that nothing else imports."""
