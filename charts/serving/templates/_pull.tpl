{{/* Environment with which a container reaches the registry. */}}
{{- define "serving.registryEnv" -}}
- name: MLFLOW_TRACKING_URI
  value: {{ .Values.mlflow.trackingUri | quote }}
- name: ICTX_PROMOTED_ONLY
  value: {{ .Values.pull.promotedOnly | quote }}
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
{{- with .Values.mlflow }}
{{- if .existingSecret }}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .usernameKey }}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .passwordKey }}
{{- end }}
{{- if .caConfigMap }}
- name: MLFLOW_TRACKING_SERVER_CERT_PATH
  value: /etc/mlflow-ca/{{ .caKey }}
{{- end }}
{{- end }}
{{- end }}

{{/* Downloads the model from the registry; the last lines of an error become the container's termination message. */}}
{{- define "serving.pullContainer" -}}
image: {{ include "serving.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command:
  {{- toYaml .Values.pull.command | nindent 2 }}
args:
  - {{ include "serving.modelUri" . | quote }}
  - --to
  - {{ include "serving.modelDir" . | quote }}
  {{- range .Values.pull.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  {{- include "serving.baseEnv" . | nindent 2 }}
  {{- include "serving.registryEnv" . | nindent 2 }}
  {{- with .Values.pull.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
securityContext:
  {{- include "serving.containerSecurityContext" . | nindent 2 }}
resources:
  {{- toYaml .Values.pull.resources | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: models
    mountPath: /models
  - name: tmp
    mountPath: /tmp
  {{- if .Values.mlflow.caConfigMap }}
  - name: mlflow-ca
    mountPath: /etc/mlflow-ca
    readOnly: true
  {{- end }}
{{- end }}
