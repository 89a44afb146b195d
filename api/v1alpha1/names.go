package v1alpha1

// Annotations of ours on the WorkloadEntry of a machine that joined.
const (
	// AnnotationMembership is the UID of the JoinToken that admitted the machine.
	// Entries without it are not ours to change.
	AnnotationMembership = "isthmus.dev/membership"
	// AnnotationObservedAddress is the source address that isthmusd saw, kept
	// apart from the address that the machine advertises.
	AnnotationObservedAddress = "isthmus.dev/observed-address"
	// AnnotationLeaving is since when the machine is on its way out: no new requests,
	// open ones may end.
	AnnotationLeaving = "isthmus.dev/leaving"
)

// Conditions in the status of a registered WorkloadEntry.
const (
	// ConditionHealthy is Istio's: requests are sent while it is True.
	ConditionHealthy = "Healthy"
	// ConditionProbed is what the machine's own probe found last. It is kept apart
	// from Healthy, which also depends on contact and on leaving.
	ConditionProbed = "Probed"
)

// Reasons of the conditions above.
const (
	ReasonJoining        = "Joining"        // registered, its proxy is not connected yet
	ReasonConnected      = "Connected"      // connected, and no probe says otherwise
	ReasonProbeSucceeded = "ProbeSucceeded" // connected, its data plane serves, and its probe, if any, passes
	ReasonProbePending   = "ProbePending"   // connected, and its probe has not said anything yet
	ReasonProbeFailed    = "ProbeFailed"    // its probe fails, or its data plane does not serve
	ReasonLostContact    = "LostContact"    // its proxy was away for longer than the grace
	ReasonLeaving        = "Leaving"        // it asked to leave: drained, never revived but by Register
)
