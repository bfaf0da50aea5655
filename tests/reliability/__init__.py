"""Programs that try what breaks under real use and print how many times each was tried; `docs/reliability.md` has their numbers."""
