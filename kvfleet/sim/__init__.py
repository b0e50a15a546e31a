"""One model of an inference engine, in virtual time: what the mock provider, the mock process and the replay drive."""
