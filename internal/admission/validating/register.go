package validating

import (
	"context"
	"fmt"
	"maps"
	"slices"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/internal/admission"
)

const (
	// ConfigurationName is that of the ValidatingWebhookConfiguration.
	ConfigurationName = "isthmus-validator"
	// Path is where the Validator is mounted.
	Path = "/validate"
)

// timeout of a review, which takes milliseconds: with the policy Ignore it is how
// long a write waits for an isthmusd that hangs.
const timeoutSeconds = 5

// Register creates or updates the ValidatingWebhookConfiguration. It is called by
// the leader, and again when the CA bundle changes.
func Register(ctx context.Context, client kubernetes.Interface, e admission.Endpoint) error {
	config, err := e.ClientConfig(Path)
	if err != nil {
		return err
	}
	webhooks := []admissionregistrationv1.ValidatingWebhook{webhook(config)}
	fresh := &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: admission.Meta(ConfigurationName, "validator"), Webhooks: webhooks,
	}
	err = admission.Put(ctx, client.AdmissionregistrationV1().ValidatingWebhookConfigurations(), ConfigurationName, fresh,
		func(have *admissionregistrationv1.ValidatingWebhookConfiguration) *admissionregistrationv1.ValidatingWebhookConfiguration {
			have = have.DeepCopy()
			have.Webhooks = webhooks
			return have
		})
	if err != nil {
		return fmt.Errorf("registering the validation webhook %s: %w", ConfigurationName, err)
	}
	return nil
}

func webhook(client admissionregistrationv1.WebhookClientConfig) admissionregistrationv1.ValidatingWebhook {
	resources := map[string][]string{} // by group
	for kind := range kinds {
		if r, ok := kind.Resource(); ok {
			resources[r.Group] = append(resources[r.Group], r.Resource)
		}
	}
	ignore := admissionregistrationv1.Ignore // why: see the package's documentation
	none := admissionregistrationv1.SideEffectClassNone
	exact := admissionregistrationv1.Exact
	scope := admissionregistrationv1.NamespacedScope
	timeout := int32(timeoutSeconds)
	var rules []admissionregistrationv1.RuleWithOperations
	for _, group := range slices.Sorted(maps.Keys(resources)) {
		slices.Sort(resources[group])
		rules = append(rules, admissionregistrationv1.RuleWithOperations{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
			Rule: admissionregistrationv1.Rule{
				// Every version that is served; resources without a slash leave out status.
				APIGroups: []string{group}, APIVersions: []string{"*"}, Resources: resources[group], Scope: &scope,
			},
		})
	}
	return admissionregistrationv1.ValidatingWebhook{
		Name: "validation.isthmus.dev", ClientConfig: client, Rules: rules,
		FailurePolicy: &ignore, SideEffects: &none, MatchPolicy: &exact, TimeoutSeconds: &timeout,
		AdmissionReviewVersions: []string{"v1"},
	}
}
