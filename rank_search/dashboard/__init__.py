"""What people look at: notes, figures and files of a study, in optuna-dashboard, in a report, a notebook. No torch."""
