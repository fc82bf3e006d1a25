"""Results for people to look at: contact sheets, the papers' tables, and pictures."""
