"""SSH to another host: for its enrolment, and as a way for streams where their ports are closed."""
