-- Prefect's server does not start without it, and its own user may not make it everywhere.
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE DATABASE nonces;
