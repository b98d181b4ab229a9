"""gRPC, owned once: `server.ServiceHost` serves, `channel` calls, `interceptors` and `status` translate."""
