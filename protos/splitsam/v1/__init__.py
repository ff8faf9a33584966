"""Messages and stubs of the splitsam.v1 API, generated from the .proto files in this folder at build time."""
