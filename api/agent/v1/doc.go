// Package agentv1 is the protocol between isthmus-agent and isthmusd beside xDS:
// enrollment, registration, health and leaving, and the two xDS resources that
// an agent is sent for itself. agent.proto is its source; `make generate` writes
// the rest. internal/agent calls it, internal/enroll answers.
package agentv1
