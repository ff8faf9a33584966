"""An HTTP gateway in front of both services, for tools and pages that do not speak gRPC."""
